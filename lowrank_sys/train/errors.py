class TrainError(Exception):
    """Something the user can act on, told in one line.

    `code` is the exit code: 2 for bad input, 1 for a failure on the way (a full disk, a broken checkpoint).
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.code = code
