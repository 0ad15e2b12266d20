"""What `deploy.wiring` imports for some roles only, in one place: who imports this has imported every role.

For the nursery, which forks any of them. Holds nothing.
"""

import workers.gate
import workers.runner
import workers.simulation
import workers.sinks.audit
import workers.sinks.delivery
import workers.sinks.labels
import workers.sinks.metrics
import workers.sinks.parking
import workers.velocity  # noqa: F401 - the imports are the point
