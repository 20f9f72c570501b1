"""The task that fills a cache."""
