"""What of this machine matters for paging experts, and what to do about it: `spac doctor`.

Each module looks at one thing and yields findings. All of them read through `spac.host.system.System`, so that a recorded tree of another
machine can be examined; what only a running machine can say comes in as `Probed`. Nothing here measures or changes anything.
"""

from __future__ import annotations

from spac.doctor.examine import Place, examine
from spac.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "Place", "examine"]
