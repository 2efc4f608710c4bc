"""The parts of `first_contact.py`: its stages, a module each, and what runs them and reports what they found."""
