// The first program of the emulated machine: runs check_threads on each instruction set.
#include <stdio.h>
#include <stdlib.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(void) {
  const char* isas[] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("HSWQ_ISA", isas[i], 1);
      execl("/check_threads", "check_threads", (char*)NULL);
      _exit(9);
    }
    int status = -1;
    waitpid(child, &status, 0);
    printf("status of %s: %d\n", isas[i], status);
    fflush(stdout);
  }
  // The serial line must send its last words before the power goes.
  tcdrain(STDOUT_FILENO);
  sleep(1);
  reboot(RB_POWER_OFF);
  for (;;) pause();
}
