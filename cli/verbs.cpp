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
std::function<int(const Context&)> bind_top(CLI::App& app);
std::function<int(const Context&)> bind_monitor(CLI::App& app);
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
std::function<int(const Context&)> bind_drain(CLI::App& app);
std::function<int(const Context&)> bind_undrain(CLI::App& app);
std::function<int(const Context&)> bind_usage(CLI::App& app);
std::function<int(const Context&)> bind_alarms(CLI::App& app);
std::function<int(const Context&)> bind_incidents(CLI::App& app);
std::function<int(const Context&)> bind_follow_faults(CLI::App& app);
std::function<int(const Context&)> bind_heal(CLI::App& app);
std::function<int(const Context&)> bind_check_gpu(CLI::App& app);
std::function<int(const Context&)> bind_diagnose(CLI::App& app);
std::function<int(const Context&)> bind_explain(CLI::App& app);
std::function<int(const Context&)> bind_bundle(CLI::App& app);
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
       "bulkhead reclaim 0000:1b:00.0 --evict    ends the virtual machine that has it\n"
       "bulkhead reclaim 0000:1b:00.0 --rescan   off the bus and on again, for one that does not start",
       "0 the host's again, or it was; 1 refused, or answered no; 2 failed, and what was undone",
       bind_reclaim},
      {"vm", "Describe virtual machines that have the devices",
       "bulkhead vm xml 0000:1b:00.0                the elements for a domain, pinned to its NUMA node\n"
       "bulkhead vm xml 7 --domain guest            a whole domain with the devices of lease 7\n"
       "bulkhead vm xml 0000:1b:00.0 --hostdev      the <hostdev> elements alone",
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
      {"top", "Watch GPUs, slices and tenants, and what is wrong with them",
       "bulkhead top                          q quits, h explains; Enter: one GPU, t: by tenant\n"
       "bulkhead top --once                   one page, for scripts\n"
       "bulkhead top --json                   every value with its age, who has what, alarms\n"
       "bulkhead top --url https://gpu7:443   another host, by its daemon",
       "0 shown, also when a GPU hangs; 2 no GPU could be looked at, or no terminal", bind_top},
      {"dmon", "Print what GPUs and slices are doing, a line each every second",
       "bulkhead dmon                          power, heat, activity, until stopped\n"
       "bulkhead dmon --count 1 --gpu 0        one look at one GPU\n"
       "bulkhead dmon --json --interval 500ms  every value with its age, a document a line",
       "0 printed; 2 could not", bind_dmon},
      {"incidents", "What the kernel's log and the driver told of, joined, with whose it was",
       "bulkhead incidents          open ones: severity, reach, whose\n"
       "bulkhead incidents --all    closed ones too, and why they are\n"
       "bulkhead incidents --watch  stay, and print again when something changes\n"
       "bulkhead incidents --json   with the evidence",
       "0 none is open; 1 some are; 2 the daemon could not be asked", bind_incidents},
      {"follow-faults", "Follow the driver's events on behalf of the daemon, which starts it",
       "bulkhead serve   starts it: records on a pipe, nothing for people", "0 the daemon went; 1 there are none",
       bind_follow_faults},
      {"heal", "What would be done about faults, what was done, what waits for a person",
       "bulkhead heal          open faults: the act, whom it costs what, what holds it back\n"
       "bulkhead heal --all    every act that is remembered\n"
       "bulkhead heal plan 3   what would be done on GPU 3, step by step, and what each tenant loses\n"
       "bulkhead heal --watch  stay, and print again when something changes\n"
       "bulkhead heal --json   for programs",
       "0 no fault waits; 1 some do; 2 the daemon could not be asked", bind_heal},
      {"check-gpu", "Check a GPU before its next tenant, on behalf of the daemon, which starts it",
       "bulkhead check-gpu --gpu UUID     what the driver says of it\n"
       "bulkhead check-gpu --device UUID  memory holds what is written, copies arrive",
       "0 good; 1 not good; 2 could not", bind_check_gpu},
      {"monitor", "Ask the driver on behalf of the daemon, which starts it",
       "bulkhead serve   starts it: frames on a socket, nothing for people", "0 the daemon went; 2 could not",
       bind_monitor},
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
      {"usage", "Say who used what of the GPUs, and what it costs",
       "bulkhead usage                                        this month so far, by tenant\n"
       "bulkhead usage --tenant blue --month 2026-11 --by day,lease\n"
       "bulkhead usage --month 2026-11 --prices prices.yaml --format html > november.html\n"
       "bulkhead usage --from 2026-11-01 --to 2026-11-08 --format csv",
       "0 shown; 1 the sums are not what the GPUs' time and counters say; 2 could not", bind_usage},
      {"audit", "What was decided and changed, and whether the log is whole",
       "bulkhead audit list\n"
       "bulkhead audit verify --state /var/lib/bulkhead   the daemon need not run",
       "0 shown, or whole; 1 the chain is broken, and where; 2 could not look", bind_audit},
      {"gpus", "The daemon's pools: which GPU serves what, who has it, and what is cordoned",
       "bulkhead gpus\n"
       "bulkhead gpus cordon 3 --why 'a fan is noisy'   no new leases there\n"
       "bulkhead gpus uncordon 3",
       "0 shown, or done; 2 could not", bind_gpus},
      {"drain", "No new leases on this host until undrain; those that are there go on",
       "bulkhead drain             and say who is still there, and until when\n"
       "bulkhead drain --dry-run   only say it\n"
       "bulkhead drain --wait=2h   and come back when nobody is left",
       "0 done (--wait: nobody is left); 1 the time is over, or you stopped waiting; 2 could not", bind_drain},
      {"undrain", "The host gives leases again; those that wait are first", "bulkhead undrain",
       "0 done; 2 could not", bind_undrain},
      {"diagnose", "Say what logs tell: faults, whose they are, how far they reach, what to do",
       "bulkhead diagnose                                     this host's kernel log\n"
       "bulkhead diagnose --from dmesg.txt fabricmanager.log  of another machine\n"
       "bulkhead diagnose --from nvidia-bug-report.log.gz     or a bundle.tar.gz\n"
       "journalctl -k -o json | bulkhead diagnose --from - --since 2h\n"
       "bulkhead diagnose --live --json                       as it happens",
       "0 nothing wrong; 1 incidents; 2 could not look", bind_diagnose},
      {"explain", "Explain an Xid, an SXid or a line of a log",
       "bulkhead explain xid 31\n"
       "bulkhead explain sxid 20034\n"
       "bulkhead explain 'NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.'",
       "0 explained; 1 unknown; 2 not to be understood", bind_explain},
      {"bundle", "Pack everything a support case needs, without secrets",
       "bulkhead bundle --out case.tar.gz          logs, driver files, the diagnosis\n"
       "bulkhead diagnose --from case.tar.gz       on any machine",
       "0 packed; 2 could not", bind_bundle},
      {"simulate", "Say what a placement policy would get out of a fleet",
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv                ours and its rivals\n"
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv --plot use.svg drawn\n"
       "bulkhead simulate --trace pods.csv --nodes-file nodes.csv --gpus 10000   the nodes repeated\n"
       "bulkhead simulate --mig h100 --mix all                                   MIG jobs come and go\n"
       "bulkhead simulate --mig host --mix 1g.10gb=3,3g.40gb=1 --gpus 16         this host's geometry\n"
       "bulkhead simulate --list                                                 what can be chosen",
       "0 simulated; 1 stopped before the end, with what was done; 2 could not", bind_simulate},
      {"alarms", "What is wrong now, what was, and what is done about it",
       "bulkhead alarms          open ones, what is (or would be) done, what closed lately\n"
       "bulkhead alarms --all    with the evidence of each\n"
       "bulkhead alarms --watch  stay, and print again when something changes\n"
       "bulkhead alarms --json   for programs",
       "0 none is open; 1 some are; 2 the daemon could not be asked", bind_alarms},
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
