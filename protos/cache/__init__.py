"""The teacher cache's file format."""
