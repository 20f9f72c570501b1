"""Parts that several tests share: real processes, real small models, real data."""
