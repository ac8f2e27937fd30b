"""Energy metering: joules from hardware counters, without Lightning."""
