"""Kubernetes objects for a job, checks of what pods cannot see, and what a node runs."""
