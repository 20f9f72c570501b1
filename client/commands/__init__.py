"""Commands of `stillhouse`, one file each."""
