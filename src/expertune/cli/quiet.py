"""Keep the libraries' own chatter out of the way of ours; warnings that concern the user stay."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence progress bars and deprecation notes of Transformers, datasets and TRL; errors and warnings remain."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.WARNING)
