"""Documents that runs leave among their artifacts, as JSON: examples of evaluations, contents of caches."""
