/* The main program of mlx-tandem.app: start a command, pass signals on to it, and end as it ends.
 *
 *     launcher SECONDS COMMAND [ARGUMENT ...]
 *
 * macOS lets a launchd agent into the local network by the app that is responsible for it, and asks for that app only
 * when its own process tries. So this one sends one packet to the network before it starts anything, tries again for
 * SECONDS while it is refused, and stays the command's parent: had it become the command, Python would be who asks.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

enum { PAUSE_MILLISECONDS = 1000 };

/* "Who is a node?", as Bonjour asks it: PTR of _mlx-tandem._tcp.local. */
static const char QUESTION[] =
    "\0\0\0\0\0\1\0\0\0\0\0\0"
    "\13_mlx-tandem\4_tcp\5local\0"
    "\0\14\0\1";

/* 0, or why the local network cannot be reached. */
static int refusal(void) {
    struct sockaddr_in bonjour;
    memset(&bonjour, 0, sizeof bonjour);
    bonjour.sin_family = AF_INET;
    bonjour.sin_port = htons(5353);
    bonjour.sin_addr.s_addr = htonl(0xE00000FB); /* 224.0.0.251 */
    int out = socket(AF_INET, SOCK_DGRAM, 0);
    if (out < 0)
        return errno;
    ssize_t sent = sendto(out, QUESTION, sizeof QUESTION - 1, 0, (struct sockaddr *)&bonjour, sizeof bonjour);
    int why = sent < 0 ? errno : 0;
    close(out);
    return why;
}

static void ask_for_the_network(long seconds) {
    int why = refusal();
    if (why == 0)
        return;
    fprintf(stderr,
            "the local network cannot be reached: %s. On a Mac, allow it: System Settings > Privacy & Security >"
            " Local Network > mlx-tandem\n",
            strerror(why));
    /* Nothing tells a program that it was allowed: it can only try again. */
    for (long left = seconds; left > 0; left--) {
        poll(NULL, 0, PAUSE_MILLISECONDS);
        if (refusal() == 0) {
            fprintf(stderr, "the local network can be reached now\n");
            return;
        }
    }
}

static void ignore(int number) { (void)number; }

int main(int count, char **arguments) {
    char *end = NULL;
    long seconds = count > 2 ? strtol(arguments[1], &end, 10) : -1;
    if (seconds < 0 || end == arguments[1] || *end != '\0') {
        fprintf(stderr, "usage: %s SECONDS COMMAND [ARGUMENT ...]\n", arguments[0]);
        return 2;
    }
    ask_for_the_network(seconds);

    sigset_t waited, none;
    sigemptyset(&none);
    sigemptyset(&waited);
    sigaddset(&waited, SIGTERM);
    sigaddset(&waited, SIGINT);
    sigaddset(&waited, SIGHUP);
    sigaddset(&waited, SIGCHLD);
    /* A blocked signal that is ignored by default may be dropped: SIGCHLD needs a handler to be waited for. */
    struct sigaction heard;
    memset(&heard, 0, sizeof heard);
    heard.sa_handler = ignore;
    sigaction(SIGCHLD, &heard, NULL);
    sigprocmask(SIG_BLOCK, &waited, NULL);

    posix_spawnattr_t fresh;
    posix_spawnattr_init(&fresh);
    posix_spawnattr_setflags(&fresh, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    posix_spawnattr_setsigmask(&fresh, &none);
    posix_spawnattr_setsigdefault(&fresh, &waited);
    pid_t child = 0;
    int failed = posix_spawnp(&child, arguments[2], NULL, &fresh, arguments + 2, environ);
    if (failed != 0) {
        fprintf(stderr, "%s cannot be started: %s\n", arguments[2], strerror(failed));
        return 1;
    }

    for (;;) {
        int number = 0, status = 0;
        if (sigwait(&waited, &number) != 0)
            continue;
        if (number != SIGCHLD)
            kill(child, number);
        else if (waitpid(child, &status, WNOHANG) == child && (WIFEXITED(status) || WIFSIGNALED(status)))
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
}
