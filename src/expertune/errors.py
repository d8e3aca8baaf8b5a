"""The errors that are meant for the person at the keyboard: each names the thing and the way out."""


class ExpertuneError(Exception):
    """A failure whose message is complete by itself: the command line prints it without a traceback."""


class ConfigError(ExpertuneError):
    """The configuration is wrong, or contradicts itself or the machine. Nothing was started."""


class Interrupted(ExpertuneError):
    """The run was stopped by a signal; everything worth keeping is saved."""


class DataError(ExpertuneError):
    """A data set is missing, empty or has bad rows. Nothing was started."""


class CollectiveError(ExpertuneError, RuntimeError):
    """A message between processes did not arrive in time, or the process at the other end is gone."""


class BackendError(ExpertuneError, RuntimeError):
    """An expert backend was asked for by name and cannot run where it is needed."""


class UnsupportedModelError(ExpertuneError, ValueError):
    """A model that would accept the name of an expert backend and ignore it.

    problem: the message without the way out.
    """

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}. {way_out}")
        self.problem = problem
