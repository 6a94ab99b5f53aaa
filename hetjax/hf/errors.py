"""The one error of this package."""


class ConvertError(ValueError):
    """A folder or checkpoint that cannot be converted; names the file and the field or key, and the way out."""
