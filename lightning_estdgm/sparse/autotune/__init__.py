"""The never-slower choice: what to time, what was timed, and which backend follows from it."""
