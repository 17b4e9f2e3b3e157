"""What was measured: the records and the file that holds them."""
