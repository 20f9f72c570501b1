"""Every training objective on languages of known truth."""
