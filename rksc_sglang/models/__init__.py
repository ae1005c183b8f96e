"""Models that come with the package, fetched or trained once and cached."""


class EmbeddedModelError(RuntimeError):
    """An embedded model could not be made ready; the message is meant for the user as it is."""
