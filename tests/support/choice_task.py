"""A task of a user for lm-eval: rows of a question, its options and the number of the right one."""

CHOICE_TASK = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_target: gold
doc_to_choice: options
target_delimiter: ''
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
