"""The server: OpenAI's API over HTTP on one loaded bundle."""
