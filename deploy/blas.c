/* A fast cblas_sgemm for MLX's Linux CPU back end, which links the reference BLAS.
 *
 * Preloaded by deploy/run. The real library is opened at the first product, so programs that never multiply
 * (git, a shell) pay nothing. fp32 only: the other types stay on MLX's own code. No part of the product.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*sgemm_function)(int, int, int, int, int, int, float, const float *, int, const float *, int, float,
                               float *, int);

static sgemm_function sgemm;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void)
{
    void *library = dlopen(TANDEM_OPENBLAS, RTLD_NOW | RTLD_LOCAL);
    sgemm = library ? (sgemm_function)dlsym(library, "scipy_cblas_sgemm") : NULL;
    if (!sgemm) {
        fprintf(stderr, "deploy/blas.c: cannot use %s: %s\n", TANDEM_OPENBLAS, dlerror());
        abort();
    }
}

void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
    pthread_once(&once, load);
    sgemm(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
