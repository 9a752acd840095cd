#include "cpu/staircase_kernel.h"
#include "cpu/masked_linear_kernel.h"
#include "cpu/masked_linear_tasks.h"
#include "cpu/autoregressive_training_kernel.h"
