"""The errors that damaged files make their readers raise."""

import struct
import tokenize
import zipfile
import zlib
from pickle import UnpicklingError

# Those of readers of JSON, TOML, zip, `.npy`, pickles and images.
RAISED_BY_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    UnpicklingError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
