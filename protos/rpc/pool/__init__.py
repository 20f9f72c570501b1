"""Work shared over the replicas of a service: load balancing, backoff, requeue of lost items, bounded waits."""
