"""A class for each kind of tracker; its library is imported as the class is."""
