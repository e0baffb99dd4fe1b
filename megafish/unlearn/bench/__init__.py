"""`megafish unlearn bench`: from nothing to a table of what every method of unlearning does, and a page of plots."""
