"""The views: each shows what the library says, and hands on what is asked for."""
