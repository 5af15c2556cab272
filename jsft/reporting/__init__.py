"""Reports: results of many steps and runs, and the course of training, as tables, figures, one HTML page."""
