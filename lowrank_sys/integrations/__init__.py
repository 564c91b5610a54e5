"""This package's optimizers in other packages' own words. Each module is for one package, and imports it."""
