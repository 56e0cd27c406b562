"""Programs that use the library, in rooms. Imports only point down this list.

train, evaluate, compare, seal            commands; nobody imports them
sharpness, robustness, strength, edge     likewise, and result_tables
benchmarks   commands that time steps, or count what they need of devices
measures     what is measured on networks, trained or in training
comparison   many runs: grid, replicas, results, statistics, report
run          one training: experiment, loop, checkpoints, folder
step         one step: state, method, devices, feeds, evaluation
config       the request of a user: options, methods, the resolved recipe
models       networks as pure functions
data         data sets, in memory or streamed
system       files, command lines, signals, processes, memory
"""
