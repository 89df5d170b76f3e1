"""The in-tray: a file that settles becomes a job. The journal is the truth; the folder only brings news."""
