"""The command table: parse, preflight, run. One thin module per command."""
