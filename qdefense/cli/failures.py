"""Which exit code an exception means, and how it is told on one line."""

from __future__ import annotations

from qdefense.audit.gate import INCOMPLETE, REFUSED, USAGE
from qdefense.audit.supervisor import UsageProblemError
from qdefense.bench.matrix import MatrixError
from qdefense.bench.store import StoreError
from qdefense.calibration import CalibrationError
from qdefense.converters.contract import ContractError
from qdefense.converters.quantize import QuantizationError
from qdefense.converters.reading import FileRefusedError
from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.data.images import DataError
from qdefense.files import reason_of
from qdefense.registry import SpecError
from qdefense.report.escaping import harmless, internal_error, shortened
from qdefense.session import SessionError

_USAGE = (
    UsageProblemError,
    DataError,
    SpecError,
    ContractError,
    CalibrationError,
    QuantizationError,
    MatrixError,
    StoreError,
)
_REFUSED = (FileRefusedError, RuntimeGraphError, SessionError)


def exit_code_of(error: Exception) -> int:
    """2 for what the user can put right, 4 for a file that is refused, 3 for a bug."""
    if isinstance(error, _USAGE) or (isinstance(error, OSError) and error.filename is not None):
        return USAGE
    return REFUSED if isinstance(error, _REFUSED) else INCOMPLETE


def message_of(error: Exception) -> str:
    """One harmless line."""
    if isinstance(error, OSError):
        return harmless(shortened(reason_of(error)))
    if exit_code_of(error) == INCOMPLETE:
        return harmless(f"{internal_error(error)}; run with -v and report it")
    return harmless(shortened(str(error)))
