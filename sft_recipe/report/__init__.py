"""What reads run folders: findings, and a report as one HTML page."""
