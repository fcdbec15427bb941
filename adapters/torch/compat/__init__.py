"""Other libraries' models and calls on these operators: `patch`, and a file of functions for each library.

None of the libraries is imported.
"""

from . import transformers as transformers
from .patching import patch as patch
