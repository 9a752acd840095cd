#include "cpu/columns.h"
#include "cpu/staircase_kernel.h"
#include "cpu/masked_linear_kernel.h"
#include "cpu/masked_linear_tasks.h"
