"""Database, run states, journal ingestion."""
