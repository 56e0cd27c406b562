"""How to read the report of a comparison."""

from experiments.comparison.significance import EXACT_SEEDS, LEVEL

HOW_TO_READ = f"""## How to read it

* *test %*: mean over seeds, its standard error, and Student's 95 % interval, of each run's best
  epoch on the validation split, with the hyperparameters of the best mean validation accuracy. The
  test split plays no part in either choice. *last epoch* is the same run without that choice of an
  epoch.
* *same epochs* and *same gradients*: mean differences in test accuracy, in points, to the baseline
  with the same number of epochs, and to plain training (sgd) with the same number of batch
  gradients, that is, more epochs. Runs are paired by seed, which fixes initialization, order of the
  examples, augmentation and wrong labels.
* *p*: two-sided paired permutation test, exact for up to {EXACT_SEEDS} seeds, after Holm's
  correction for all comparisons of a table. **Bold** is significant at
  {100 * (1 - LEVEL):.0f} %. The intervals are not corrected.
* Without --confirm, the hyperparameters are chosen by validation accuracies of the same runs whose
  test accuracies are compared. A method with many values then looks a little better than it is,
  and its p-values are a little too small. With it, only runs of fresh seeds are compared.
* The seeds do not vary the data split: intervals and p-values are about this test split. Each
  table is corrected by itself.
* *gradients*: number of batch gradients of a run. *time*: of a run, and *ms per step*: a run's
  share of the time of the runs computed at once (their number in parentheses), evaluation included
  except for runs of experiments.train.
* summary.csv has this table, runs.csv every run, curves.csv every epoch (several tasks have a
  folder each)."""
