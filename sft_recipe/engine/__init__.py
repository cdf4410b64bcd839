"""verl's engine as this recipe uses it. With training/, the only code that imports verl."""
