"""How many replicas there should be: by the requests that they have under way.

Ray counts the requests that its own proxy hands out. Those that reach a replica's own port are
counted by the replica, whose count holds both kinds. Ray's controller imports this module.
"""

from __future__ import annotations

from typing import Any

REQUESTS = "requests"  # the replicas' number in what they record for Ray


def by_requests(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray's autoscaling policy: as many replicas as keep the mean of their requests at the target.

    Args:
        context: Ray's AutoscalingContext.

    Returns:
        The number wanted, to which Ray applies bounds and delays, and no state.
    """
    counts = (context.aggregated_metrics or {}).get(REQUESTS, {})
    if not counts:  # no replica has told yet
        return float(context.target_num_replicas), {}
    # A replica that has not told yet is taken for one like the others.
    mean = sum(counts.values()) / len(counts)
    return mean * context.current_num_replicas / context.config.get_target_ongoing_requests(), {}
