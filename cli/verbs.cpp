#include "cli/cli.hpp"

namespace bulkhead::cli {

// Each row: name, summary, examples, exit codes, and bind_NAME from verb_NAME.cpp.
std::function<int(const Context&)> bind_doctor(CLI::App& app);
std::function<int(const Context&)> bind_inventory(CLI::App& app);
std::function<int(const Context&)> bind_schema(CLI::App& app);
std::function<int(const Context&)> bind_import(CLI::App& app);
std::function<int(const Context&)> bind_plan(CLI::App& app);
std::function<int(const Context&)> bind_apply(CLI::App& app);
std::function<int(const Context&)> bind_verify(CLI::App& app);
std::function<int(const Context&)> bind_rollback(CLI::App& app);
std::function<int(const Context&)> bind_reclaim(CLI::App& app);
std::function<int(const Context&)> bind_vm(CLI::App& app);
std::function<int(const Context&)> bind_history(CLI::App& app);
std::function<int(const Context&)> bind_share(CLI::App& app);
std::function<int(const Context&)> bind_dmon(CLI::App& app);
std::function<int(const Context&)> bind_simulate(CLI::App& app);
std::function<int(const Context&)> bind_serve(CLI::App& app);
std::function<int(const Context&)> bind_login(CLI::App& app);
std::function<int(const Context&)> bind_logout(CLI::App& app);
std::function<int(const Context&)> bind_lease(CLI::App& app);
std::function<int(const Context&)> bind_tenant(CLI::App& app);
std::function<int(const Context&)> bind_quota(CLI::App& app);
std::function<int(const Context&)> bind_token(CLI::App& app);
std::function<int(const Context&)> bind_audit(CLI::App& app);
std::function<int(const Context&)> bind_gpus(CLI::App& app);
std::function<int(const Context&)> bind_twin(CLI::App& app);

const std::vector<Verb>& verbs() {
  static const std::vector<Verb> table = {
      {"doctor", "Say what keeps this host from slicing its GPUs, and how to mend it",
       "bulkhead doctor                    every check, findings first\n"
       "bulkhead doctor --for passthrough  only what passthrough needs\n"
       "bulkhead doctor --json             findings for programs\n"
       "bulkhead doctor --list             the checks, without looking",
       "0 nothing to mend; 1 findings; 2 could not look", bind_doctor},
      {"inventory", "Show the host, its GPUs, MIG instances and who uses them",
       "bulkhead inventory            one page\n"
       "bulkhead inventory --gpu 3    one GPU in full\n"
       "bulkhead inventory --json     everything, for programs",
       "0 shown, with what could not be read and why; 2 nothing could be read", bind_inventory},
      {"schema", "Print the JSON Schema of the node file, for editors",
       "bulkhead schema > node.schema.json   then point the editor's YAML plugin at it",
       "0 printed; 2 could not write", bind_schema},
      {"import", "Turn another tool's configuration into node files",
       "bulkhead import mig-parted config.yaml                        the names in it\n"
       "bulkhead import mig-parted config.yaml --config all-balanced  one as a node file\n"
       "bulkhead import mig-parted config.yaml --out nodes            each in a file of its own",
       "0 converted; 2 the file has mistakes or could not be read", bind_import},
      {"plan", "Show what apply would do: each step, why, who loses what, and its undo",
       "bulkhead plan -f node.yaml          the steps, for people\n"
       "bulkhead plan -f node.yaml --json   for programs\n"
       "bulkhead plan -f node.yaml --evict  as if holders might be ended\n"
       "bulkhead plan --what-if '12 x 3g.40gb'                           would they fit, after which moves?\n"
       "bulkhead plan --what-if '2 x 7g.80gb' --inventory a.json b.json  on a fleet, read elsewhere",
       "0 a plan, or nothing to do, or it fits; 1 refused, or it does not fit, with reasons; 2 could not "
       "look (whether anything differs: verify)",
       bind_plan},
      {"apply", "Make the host what a node file says, or leave it as it was",
       "bulkhead apply -f node.yaml            shows the plan, asks, carries it out\n"
       "bulkhead apply -f node.yaml --yes      without asking\n"
       "bulkhead apply -f node.yaml --dry-run  the plan alone\n"
       "bulkhead apply -f node.yaml --evict    ends the processes that are in the way\n"
       "bulkhead apply -f node.yaml --adopt    takes over MIG instances made by others",
       "0 done, or nothing to do; 1 refused, answered no, or still differs; 2 failed, and what was undone",
       bind_apply},
      {"verify", "Say whether the host still is what a node file says",
       "bulkhead verify -f node.yaml         exit 0: it is; 1: the differences\n"
       "bulkhead verify -f node.yaml --json  for monitoring",
       "0 as written; 1 it differs, or the file asks for what cannot be; 2 could not look", bind_verify},
      {"rollback", "Take the last apply back",
       "bulkhead rollback                shows the undos, asks, carries them out\n"
       "bulkhead rollback --yes          without asking\n"
       "bulkhead rollback --yes --json   for programs",
       "0 taken back, or nothing to; 1 refused, or answered no; 2 failed, and what is left", bind_rollback},
      {"reclaim", "Take devices back from virtual machines",
       "bulkhead reclaim 0000:1b:00.0            with its companions, back to the host's own drivers\n"
       "bulkhead reclaim 0000:1b:00.0 --dry-run  what that would do\n"
       "bulkhead reclaim 0000:3b:00.0 --yes      a network card: its virtual functions go\n"
       "bulkhead reclaim 0000:1b:00.0 --evict    ends the virtual machine that has it",
       "0 the host's again, or it was; 1 refused, or answered no; 2 failed, and what was undone",
       bind_reclaim},
      {"vm", "Describe virtual machines that have the devices",
       "bulkhead vm xml 0000:1b:00.0 > guest.xml   a libvirt domain, pinned to the device's NUMA node\n"
       "bulkhead vm xml 0000:1b:00.0 --hostdev     the <hostdev> elements alone",
       "0 printed; 2 a device is not with vfio-pci, or could not look", bind_vm},
      {"history", "Show what bulkhead did to this host",
       "bulkhead history         the runs, newest first\n"
       "bulkhead history 7       one run, step by step\n"
       "bulkhead history --json  everything",
       "0 shown; 2 no such run, or no readable journal", bind_history},
      {"share", "Share one GPU's time and memory between programs that know nothing of it",
       "bulkhead share run --weight 30 --memory 20GiB -- python3 train.py   a tenant with 30 parts of the "
       "time\n"
       "bulkhead share run --class interactive -- ./serve                   in another terminal: at once "
       "when it has work\n"
       "bulkhead share list                                                 who runs, asked and received\n"
       "bulkhead share set train --weight 60                                while it runs\n"
       "bulkhead share top                                                  the same, live\n"
       "bulkhead share selftest                                             does this driver obey?",
       "0 done; 1 selftest: the driver does not obey; 2 could not; run: those of the program", bind_share},
      {"serve", "Serve tenants and leases: HTTPS on port 443 and a Unix socket",
       "bulkhead serve                                             as /etc/bulkhead/serve.yaml says\n"
       "bulkhead serve --check                                     every mistake of the file, and end\n"
       "bulkhead serve --listen 127.0.0.1:8443 --socket /tmp/b.sock -f node.yaml\n"
       "systemctl enable --now bulkhead.socket bulkhead.service    as a service",
       "0 ended by SIGTERM or SIGINT; 2 could not begin, or the file has mistakes", bind_serve},
      {"dmon", "Print what GPUs and slices are doing, a line each every second",
       "bulkhead dmon                          power, heat, activity, until stopped\n"
       "bulkhead dmon --count 1 --gpu 0        one look at one GPU\n"
       "bulkhead dmon --json --interval 500ms  every value with its age, a document a line",
       "0 printed; 2 could not", bind_dmon},
      {"login", "Remember a server and a token for it",
       "bulkhead login https://gpu7.example                  shows its fingerprint, asks for the token\n"
       "bulkhead login https://gpu7:8443 --fingerprint SHA256 --token-file FILE   for scripts\n"
       "bulkhead login https://gpu7.example --ca ca.pem --token-file -            token from standard input",
       "0 kept; 1 your own no; 2 not reached, not trusted, or the token is not good", bind_login},
      {"logout", "Forget what login kept", "bulkhead logout   the token stays good until it is revoked",
       "0 forgotten, or there was none; 2 could not", bind_logout},
      {"lease", "Ask for slices, run in them, give them back",
       "bulkhead lease create --class mig --profile 3g.40gb --ttl 1h --wait   a slice for an hour\n"
       "bulkhead lease list                                                   yours\n"
       "bulkhead lease show 7                                                 devices, environment, promises\n"
       "bulkhead lease run 7 -- python3 train.py                              in it, renewed meanwhile\n"
       "bulkhead lease release 7                                              give it back",
       "0 done (create --wait: active); 1 refused, or it failed, or you stopped waiting; 2 could not; run: those of the "
       "program",
       bind_lease},
      {"tenant", "Whom the host serves",
       "bulkhead tenant list\n"
       "bulkhead tenant put vision --weight 200 leases=8 gpus=2   made, or changed\n"
       "bulkhead tenant end vision",
       "0 done; 2 could not, or may not", bind_tenant},
      {"quota", "What a tenant may hold at most",
       "bulkhead quota show                               your own\n"
       "bulkhead quota set vision leases=8 memory=320GiB  what is not said stays",
       "0 done; 2 could not, or may not", bind_quota},
      {"token", "Who may speak to the daemon, as whom",
       "bulkhead token create --user alice --role tenant --tenant vision --ttl 30d\n"
       "bulkhead token list\n"
       "bulkhead token revoke 0123456789abcdef",
       "0 done; 2 could not, or may not", bind_token},
      {"audit", "What was decided and changed, and whether the log is whole",
       "bulkhead audit list\n"
       "bulkhead audit verify --state /var/lib/bulkhead   the daemon need not run",
       "0 shown, or whole; 1 the chain is broken, and where; 2 could not look", bind_audit},
      {"gpus", "The daemon's pools: which GPU serves what, and who has it", "bulkhead gpus\nbulkhead gpus --json",
       "0 shown; 2 could not", bind_gpus},
      {"simulate", "Say what a placement policy would get out of a fleet",
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv                ours and its rivals\n"
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv --plot use.svg drawn\n"
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv --gpus 10000   the nodes repeated\n"
       "bulkhead simulate --mig h100 --mix all                                   MIG jobs come and go\n"
       "bulkhead simulate --mig host --mix 1g.10gb=3,3g.40gb=1 --gpus 16         this host's geometry\n"
       "bulkhead simulate --list                                                 what can be chosen",
       "0 simulated; 1 stopped before the end, with what was done; 2 could not", bind_simulate},
      {"twin", "Bring up a pretend machine to try everything on",
       "bulkhead twin list                              profiles, and twins that are up\n"
       "bulkhead twin up dgx-h100 --dir /tmp/d          eight H100 that are not there\n"
       "bulkhead twin run --dir /tmp/d -- nvidia-smi    any program against it\n"
       "bulkhead twin load 0 --watts 650 --dir /tmp/d   and step 10s: warmer\n"
       "bulkhead twin break lost-from-nvml --gpu 3      one surface fails alone\n"
       "bulkhead twin down --dir /tmp/d                 gone",
       "0 done; 1 compare: differences; 2 could not; run: those of the program", bind_twin},
  };
  return table;
}

}  // namespace bulkhead::cli
