"""The check of Stillhouse on one GPU in ten minutes: what it computes, how fast, and what a student learns."""
