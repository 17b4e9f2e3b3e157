"""The server of a bundle on a board: a job there, and the way to its port from here."""
