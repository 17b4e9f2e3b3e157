"""Boards: reaching them over SSH, bringing bundles there, and running them.

`connection` says what a connection guarantees; `ssh` and `local` are its two forms. What has to
run on a board is a file in `programs/` that travels as text with each call: nothing is installed.
"""
