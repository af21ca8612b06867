"""What can be done to components: fixes, and the operations that steps of a recipe name."""

from builder.operations.lora.apply import APPLY_LORA
from builder.operations.lora.extract import EXTRACT_LORA, RESIZE_LORA
from builder.operations.mecha import MECHA
from builder.operations.merges import MERGES
from builder.operations.reductions import REDUCTIONS
from builder.operations.registry import Operation

OPERATIONS: dict[str, Operation] = {
    **{m.name: m.operation for m in (*MERGES, *REDUCTIONS)},
    **{o.name: o for o in (APPLY_LORA, EXTRACT_LORA, RESIZE_LORA, MECHA)},
}
