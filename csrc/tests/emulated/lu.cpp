#include "tests/emulated/register.h"
//
#include "cuda/lu.cu"
