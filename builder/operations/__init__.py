"""What can be done to components: fixes, and the operations that steps of a recipe name."""

from builder.operations.lora.apply import APPLY_LORA
from builder.operations.merges import MERGES
from builder.operations.reductions import REDUCTIONS
from builder.operations.registry import Operation

OPERATIONS: dict[str, Operation] = {
    **{m.name: m.operation for m in (*MERGES, *REDUCTIONS)},
    APPLY_LORA.name: APPLY_LORA,
}
