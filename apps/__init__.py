"""The app layer over the domains: command line, training, jobs."""
