"""What every script needs and no algorithm decides: see the table in README.md."""
