"""Rows in any form -> messages -> a selection of them -> conversations by split: pure functions, in the order of use.

files.py       data files -> rows
turns.py       turns as people write them -> role, text, and whether an answer is trained on
pairs.py       questions and answers in columns, and lists of turns -> turns -> message rows
forms.py       rows in any form -> message rows; a form is an entry of FORMS
fields.py      fields of a message row -> flags and numbers, or what is wrong with them
messages.py    message rows -> the table of messages, or what is wrong with a row
selection.py   the table, the threads found in it, and the funnel that counts what each step drops
filters.py     what drops a message or a thread; a filter is an entry of FILTERS or THREAD_FILTERS
threads.py     trees -> threads, each from a question to an answer
splits.py      which split a file states, and what becomes of it; which threads are trained on, and how often
duplicates.py  copies, near copies and held-out questions
held_out.py    which trees are held out where a data set brings no split of its own
tables.py      chosen threads -> the tables and counts that are written
known.py       the size of published data sets
"""
