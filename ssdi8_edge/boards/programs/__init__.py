"""Programs that run on a board: their text is sent over a connection and leaves nothing behind.

Each file defines `main(wire)`. They use Python 3.8 and its standard library, never import the
package, and do not look at clocks: a board without a battery starts in 1970.
"""
