#include "cpu/columns.h"
#include "cpu/staircase_kernel.h"
#include "cpu/conv_net_kernel.h"
#include "cpu/glow_step_kernel.h"
