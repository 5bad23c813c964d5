"""The gate, tested on itself: planted faults that it must name, and honest rebuilds that it must let pass."""
